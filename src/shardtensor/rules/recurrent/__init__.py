"""RNN, GRU and LSTM, and sequences of several lengths"""
