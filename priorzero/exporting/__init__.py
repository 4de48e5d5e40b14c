"""Exporting a trained agent for others, and loading its world model again."""
