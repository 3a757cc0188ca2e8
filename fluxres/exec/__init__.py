"""Running jobs: job_exec on rank 0, shells on every rank, and how shells are found again."""
