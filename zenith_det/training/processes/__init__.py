"""The processes of a run: started, told apart, kept in agreement, ended together."""
