"""Layers that know nothing of experts, engines or ranks."""
