"""Attention: whole, masked by blocks, of neighbourhoods, of sequences of several lengths"""
