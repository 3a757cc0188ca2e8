"""fluxres: a resource manager that can be killed at any moment without losing a job."""

__version__ = "0.1.0"
