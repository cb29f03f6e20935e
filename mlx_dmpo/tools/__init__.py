"""Commands besides training and evaluation: plan, doctor, export, sample, demo"""
