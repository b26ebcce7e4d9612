"""What a user names on the command line turned into models and data: zoo, folders, factories, hub."""
