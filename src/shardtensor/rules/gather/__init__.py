"""Rows and elements by tensors of indices: looked up, gathered, scattered, in segments"""
