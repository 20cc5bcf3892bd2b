"""Connections: their two halves over sockets and streams, what each is for, how they are dialled and accepted."""
