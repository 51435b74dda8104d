"""Fourier transforms: whole, of the kept modes only, and of short stretches of time"""
