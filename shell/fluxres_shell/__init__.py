"""The job shell: the process that runs one rank's part of one job, and outlives any broker."""
