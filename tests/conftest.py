"""Settings that all tests share."""

from hypothesis import settings

# First calls compile or load things, so a deadline per example says nothing. The examples are the same in
# every run: a failure is found again.
settings.register_profile("fastdiff", deadline=None, derandomize=True)
settings.load_profile("fastdiff")
