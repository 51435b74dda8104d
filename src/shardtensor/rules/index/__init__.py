"""x[...] and masks"""
