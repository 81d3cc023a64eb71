"""What holds for all tests."""

from hypothesis import settings

settings.register_profile("patient", deadline=None)  # a time-out of an example tells of the machine, not of the code
settings.load_profile("patient")
