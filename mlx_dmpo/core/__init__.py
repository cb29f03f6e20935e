"""The method: arrays in, arrays out. mlx and numpy only: no files, no settings, no printing"""
