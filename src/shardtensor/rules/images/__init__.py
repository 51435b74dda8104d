"""Images of any number of dims: pooled, sampled, padded, taken apart into blocks, shuffled"""
