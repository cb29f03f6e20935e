"""SFT and DMPO training"""
