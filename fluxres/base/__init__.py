"""Values shared by every room of fluxres: pure, small, quick to import. Import its modules one by one."""
