"""Numeric formats: which dtype computes, and the one Linear through which every GEMM goes."""
