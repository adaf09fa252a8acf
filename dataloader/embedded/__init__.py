"""Rendered stand-ins for the published images."""
