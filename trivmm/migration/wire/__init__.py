"""What two hosts say to each other: frames, the messages in them, and which may come when. Pure, no trio."""
