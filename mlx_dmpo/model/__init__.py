"""Models through mlx-lm: load, adapt, encode, score, generate. The only importer of mlx_lm"""
