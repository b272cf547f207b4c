"""Using a trained model: from whatever names it to what it finds in images, folders and videos."""
