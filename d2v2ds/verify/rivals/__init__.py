"""Golden cases of methods that data2vec 2.0 is compared with."""
