"""What models call: each operation's plain-XLA definition, which is its reference and its documentation."""
