"""What compares elements: the largest, sorted, counted, distinct, the k-th"""
