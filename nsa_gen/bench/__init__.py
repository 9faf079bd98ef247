"""Measure how fast a generated operator is, and compare it with others."""
