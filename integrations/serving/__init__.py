"""Servers: what tells whether one really serves an adapter."""
