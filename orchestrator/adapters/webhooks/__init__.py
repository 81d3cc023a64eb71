"""Webhooks: what is told of jobs, as signed HTTP requests."""
