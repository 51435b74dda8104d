"""A step on fake tensors: what its ops compute, hold, move and send, and which values are known"""
