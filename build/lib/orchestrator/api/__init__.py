"""The contract: what users write, what stages read and answer, and what is stored.

Everything here is pydantic or the standard library, imports nothing else of the project, and is what the trainer
image shares with the controller. CRDs, JSON schemas and the reference pages are generated from these models.
"""
