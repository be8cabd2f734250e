"""saezoo"""
