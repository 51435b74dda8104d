"""Convolutions: the rows of the input that my rows of the output need, fetched or in flight"""
