"""Measurements of adaptlr. README.md beside this file tells which question each answers."""
