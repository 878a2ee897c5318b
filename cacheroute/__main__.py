from cacheroute.cli import main

main()
