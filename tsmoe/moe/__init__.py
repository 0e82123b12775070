"""Mixture of experts: routing, dispatch and expert compute; runs with and without ranks."""
