"""Other shapes of the same elements: permuted, reshaped, sliced, strided, joined"""
