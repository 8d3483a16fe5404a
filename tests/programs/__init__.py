"""Programs as a reader might write them, each with a simulator of data from known truth."""
