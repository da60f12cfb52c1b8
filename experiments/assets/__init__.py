"""Embedded models and texts, described in ASSETS.md, and the program for the texts."""
