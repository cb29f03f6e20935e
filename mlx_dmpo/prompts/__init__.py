"""Prompt templates: examples to text"""
