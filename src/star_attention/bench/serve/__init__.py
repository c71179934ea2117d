"""`bench serve`: a server under load, over loopback, compared with the same work in Python."""
