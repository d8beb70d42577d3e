"""What is remarkable about the labels of a store, and which case a person should look at first."""
