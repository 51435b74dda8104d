"""Products, matrices and vectors: contractions, factors, norms, distances, diagonals"""
