"""Many drafts on one set of chats: the pool they share, ways to choose samples, and counts with intervals."""
