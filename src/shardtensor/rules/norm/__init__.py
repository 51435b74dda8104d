"""Normalisations: batch, instance, group, layer and rms norm, and the statistics they share"""
