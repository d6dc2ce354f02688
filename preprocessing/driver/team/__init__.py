"""One program on many processes: local workers, or the ranks of an MPI job."""
