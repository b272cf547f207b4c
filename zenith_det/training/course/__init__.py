"""The course of a run: where it starts and resumes, what it records, what its evaluations decide."""
