"""The scheduler: what is free, who goes next, and (in its service) the answers to the job manager."""
