"""What is done to the project, not with it: wheels, the check of a wheel, the versions that it runs with. The Makefile calls these."""
