"""Commands beside training and evaluation: plan, doctor, export, sample, demo"""
