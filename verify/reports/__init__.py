"""What commands leave on screen and paper: tables, Markdown for a pull request, pages with pictures."""
