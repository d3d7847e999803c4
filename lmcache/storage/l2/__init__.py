"""Tiers below host memory."""
