"""How long the end of a daemon may take, seconds."""

#: Beyond the grace: in which all runs are to be gone and their output stored.
STOPPED = 3.0
#: And in which the other executors and the database are told.
LEFT = 3.0
